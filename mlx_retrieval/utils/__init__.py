"""Share errors, files, locks, console and progress; imports no mlx."""
