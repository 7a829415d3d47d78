"""The demo: semantic search over old books, and the memory story of that very run."""
