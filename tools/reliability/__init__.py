"""Whether anything is lost when processes are killed, disks are full, files are hostile and several write at a time."""
