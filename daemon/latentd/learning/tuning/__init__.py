"""Tuning: what the choices of split, tokens and codec cost on this device and give on taught data, and which one to take."""
