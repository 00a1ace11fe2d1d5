"""Replay: how latents are stored in few bits (codec, latents), who stays in the bounded memory, and the durable journal."""
