"""From inputs to a results folder: prompts, models by name, runs, and the demo.

The command line owns no logic; what it does lives here.
"""
