"""Where arrays live: a mesh of devices, and rules from the models' logical axes to the mesh's."""
