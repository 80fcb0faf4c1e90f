"""Clients of a served adaptive ViT: gRPC, HTTP and asyncio gRPC."""
