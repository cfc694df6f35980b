/** What verify has to say: findings that name the file, the frames, and the points and blocks that they touch. */

/**
 * - `damage`: something is not what was written, or is gone; exit code 5;
 * - `unreadable`: the store could not read it, so nobody knows; exit code 3;
 * - `note`: harmless, or known and set aside; worth a line.
 */
export type Severity = 'damage' | 'unreadable' | 'note';

/**
 * - `config`: `config` or its copy; `object`: a sealed object; `snapshot`: a snapshot whose point is not there; `name`: an object that no
 *   b2 wrote; `epoch`: a volume's claims are lost;
 * - `segment`: a part of the manifest; `chain`: commits that do not continue each other; `lost`: commits that are nowhere;
 *   `unlisted`: commits that the manifest does not know; `journal`: an entry of the journal; `stray`: commits off the chain;
 * - `pack`: a pack that cannot be opened, or is another; `missing`: a pack that is used and not there; `footer`; `frame`: a damaged frame;
 *   `absent`: a frame that is used and not there; `place`: a record that names blocks which its chunk does not have; `leftover`: bytes or packs
 *   of a crash;
 * - `quarantine`: frames set aside by repair; `rollback`: older than what this machine has seen; `differs`: not what the device holds;
 * - `filesystem`: a file system of an image is not sound; `boot`: a machine did not start from an image.
 */
export type FindingKind =
  | 'config'
  | 'object'
  | 'snapshot'
  | 'name'
  | 'epoch'
  | 'segment'
  | 'chain'
  | 'lost'
  | 'unlisted'
  | 'journal'
  | 'stray'
  | 'pack'
  | 'missing'
  | 'footer'
  | 'frame'
  | 'absent'
  | 'place'
  | 'leftover'
  | 'quarantine'
  | 'rollback'
  | 'differs'
  | 'filesystem'
  | 'boot';

/** A frame and where it lies in its pack, header included, where that is known. */
export interface FramePlace {
  readonly number: number;
  readonly offsetBytes?: number;
  readonly lengthBytes?: number;
}

/** Bytes of a volume, as its device has them. */
export interface VolumeRange {
  readonly offset: number;
  readonly length: number;
}

/** What of one volume needs the damaged places. */
export interface TouchedVolume {
  readonly volumeId: string;
  readonly name: string;
  /** Recovery points whose image needs them. */
  readonly points: number;
  readonly firstSeq: number;
  readonly lastSeq: number;
  /** Runs of commits, ascending; at most {@link MAX_RANGES}. */
  readonly runs: readonly { readonly firstSeq: number; readonly lastSeq: number }[];
  /** Ranges of the device, ascending; at most {@link MAX_RANGES}. */
  readonly ranges: readonly VolumeRange[];
  /** All of them together, also those left out of `ranges`. */
  readonly bytes: number;
}

/** Ranges listed of one finding and volume: more than a person reads, and a bound for memory. */
export const MAX_RANGES = 256;

export interface Finding {
  readonly severity: Severity;
  readonly kind: FindingKind;
  /** Name of the object (its path below the repository), or the device compared with. */
  readonly object: string;
  readonly message: string;
  readonly hint?: string;
  readonly packId?: string;
  readonly frames?: readonly FramePlace[];
  /** Set once the places were looked for: empty when no recovery point needs them. */
  readonly touches?: readonly TouchedVolume[];
}

/** `message` without the words that point back at verify: this is verify. */
export function problemOf(message: string, object: string): string {
  return message.startsWith(`${object}: `) ? message.slice(object.length + 2) : message;
}
