"""What lies on disk: graphs and their roles, what they learned from, and assembled repositories."""
