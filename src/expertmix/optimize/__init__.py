"""Better decisions for one sample: C3PO. Filled by its issue."""
