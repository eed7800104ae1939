"""What people and programs read: progress, plans, tables, records, the reference of the kinds."""
