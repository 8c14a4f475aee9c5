"""What a memory is worth, seen on this machine: facts told, minutes of talk, and questions."""
