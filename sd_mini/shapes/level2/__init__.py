"""Level 2 of the shapes world: groups with counts, chains of relations, patterns, backgrounds, sizes and overlap."""
