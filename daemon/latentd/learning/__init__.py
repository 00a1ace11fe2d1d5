"""What learns: the streaming ridge head, the trained head above it, the gate, snapshots, and the thread that drives them."""
