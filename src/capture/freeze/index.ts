/** Points of class `fs` and `app`: see quiesced-point.ts for what they promise and how. */
export { Freezer, thawStale, type FreezerOptions } from './freezer.js';
export { runHook, type Hooks } from './hooks.js';
export { mountsOf, type WatchedMount } from './mounts.js';
export { Quiescer, type QuiescerOptions } from './quiescer.js';
export {
  DEFAULT_FREEZE_MS,
  quiescedPoint,
  type Freeze,
  type FreezesFor,
  type PointMaker,
  type QuiesceOptions,
  type QuiescedPoint,
} from './quiesced-point.js';
