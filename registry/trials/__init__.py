"""Silent trials: a challenger sees what the champion answers, and nobody sees what it says."""
