"""Ebbtide inside of other libraries and tools; each module needs only its own."""
