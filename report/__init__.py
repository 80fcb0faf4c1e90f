"""What people look at: pages of one file each, and tables and bars on a terminal.

Every part of the project hands plain data to this package, which imports none of them. Numbers,
cases and warnings are computed by their owners; here they become figures, tables and captions.
"""
