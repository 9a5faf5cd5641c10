// The sections in their order.

import { blocks } from "./blocks.js";
import { cost } from "./cost.js";
import { field } from "./field.js";
import { kernel } from "./kernel.js";
import { lists } from "./lists.js";
import { neuron } from "./neuron.js";
import { padding } from "./padding.js";
import { shift } from "./shift.js";
import { vae } from "./vae.js";

export const sections = [lists, kernel, padding, neuron, field, shift, blocks, vae, cost];
