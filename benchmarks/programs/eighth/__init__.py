"""Programs and loops of kinds that no earlier folder has, frozen before they were asked."""
