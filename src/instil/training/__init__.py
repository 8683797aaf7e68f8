"""The only loop: from token trees and a model to a tuned model."""
