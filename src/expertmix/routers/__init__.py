"""Who decides: routers score adapters by what they read, rules turn scores into weights.

Routers are frozen, hold no state, and know neither models nor files. A new one is one file, and one
line in `table`.
"""
