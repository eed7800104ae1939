"""What would run, why, what it costs and whether it fits: sessions, keys, decisions, forecasts, the machine."""
