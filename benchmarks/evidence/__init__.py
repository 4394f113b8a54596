"""Every plan compiled for parts that need not be there, and what the machine code says."""
