"""The modules behind `hw3gpu.nn`: batch normalisation, its conversion, what tools for models find in them."""
