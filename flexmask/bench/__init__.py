"""Times attention on one layout, with its peers and the lower bound; see docs/compare.md."""
