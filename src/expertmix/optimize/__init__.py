"""Better decisions for one sample: C3PO and its rivals.

A reference set holds what a model solved and how it was routed then (`reference`), `neighbors`
finds what is similar to a sample, a method (`table`) finds a better pathway for it, and `remix`
runs all of it. None of them knows a model: they see `core.pathway.Pathways`.
"""
