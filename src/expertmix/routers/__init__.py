"""Who decides: policies that give weights to experts. Filled by SpectR, Arrow and the orchestrator."""
