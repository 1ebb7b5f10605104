"""How fast attention is on one layout, beside its peers and the floor. docs/compare.md."""
