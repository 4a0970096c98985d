"""The sections of the page, one per file.

Each file turns numbers of a report into a headline sentence, a sentence on how to read, and a
picture. `section(report)` gives None where the report has nothing to say on the matter.
"""
