/** An image under a throw-away overlay, which remembers what reading it has failed with. */
import type { Image } from '../image.js';
import { openTemporaryOverlay, type WritableImage } from '../nbd/index.js';
import { withVolumes, type PlacedVolume } from './volumes-image.js';

export interface ThrowAway {
  readonly image: WritableImage;
  readonly failures: readonly unknown[];
  /** Puts something else that went wrong among the failures. */
  readonly failed: (error: unknown) => void;
}

/** Failures that are kept: the first ones tell. */
const KEPT = 100;

/** Takes `base` over: it is closed with the overlay. Behind its end lie `volumes`. */
export async function throwAwayOverlay(
  base: Image,
  volumes: readonly PlacedVolume[] = [],
): Promise<ThrowAway> {
  const failures: unknown[] = [];
  const failed = (error: unknown): void => {
    if (failures.length < KEPT && !failures.includes(error)) failures.push(error);
  };
  const told = (error: unknown): never => {
    failed(error);
    throw error;
  };
  const watched: Image = {
    sizeBytes: base.sizeBytes,
    logicalBlockBytes: base.logicalBlockBytes,
    read: (into, offset) => base.read(into, offset).catch(told),
    extents: (offset, length, limit) => base.extents(offset, length, limit).catch(told),
    close: () => base.close(),
  };
  const overlay = await openTemporaryOverlay({ base: watched });
  return { image: withVolumes(overlay, volumes), failures, failed };
}
