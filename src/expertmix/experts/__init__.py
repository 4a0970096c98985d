"""Who is chosen, and how outputs combine. Filled by adapters, chains and consortia."""
