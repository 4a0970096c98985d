"""Who decides: policies that give weights to experts."""
