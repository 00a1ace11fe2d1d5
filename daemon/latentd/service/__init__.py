"""HTTP: the event loop, its threads, and the life cycle of the daemon."""
