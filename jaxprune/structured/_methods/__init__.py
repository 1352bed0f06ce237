"""Published methods, as compositions of groups, scores and plans."""
