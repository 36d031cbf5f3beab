"""Sound: from files and synthesizers to waveforms, and from waveforms to frozen encoder features."""
