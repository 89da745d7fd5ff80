"""Many devices and many processes: the mesh, where arrays live, and joining a job."""
