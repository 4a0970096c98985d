"""The decision: what it is, where and for whom it is made, how it is edited, recorded and kept."""
