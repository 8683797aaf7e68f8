"""Trees against separate sequences through the unmodified model: the same losses and the same gradients."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from forests import *  # placeholder
