"""Solution paths over all strengths of a penalty, with warm starts, scores and selection."""
