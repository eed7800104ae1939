"""What several tests build on: tiny real models, a loopback Hub."""
