"""The questions of `simpletuner configure`, and the draft of the files that the answers become."""
