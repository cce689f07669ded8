"""A penalty's whole range of strengths, warm-started, scored and chosen."""
