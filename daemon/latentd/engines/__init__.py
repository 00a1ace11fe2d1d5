"""The frozen stage: one protocol, several engines, and the gate that compares each with eager PyTorch."""
