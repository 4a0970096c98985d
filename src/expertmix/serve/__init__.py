"""The OpenAI-compatible server and the audit log. Filled by their issue."""
