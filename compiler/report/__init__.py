"""What people read: progress, diagnostics, quantities, tables."""
