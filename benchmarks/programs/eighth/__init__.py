"""Programs and loops of kinds that no earlier folder has, written and frozen before they were asked."""
