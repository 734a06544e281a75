"""What Python and the kernel may do at any moment: interrupts, forks, locks, descriptors, limits."""
