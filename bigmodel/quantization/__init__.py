"""Encoders whose bytes equal bitsandbytes' own."""
