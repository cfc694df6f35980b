/**
 * TapeDrive: what a tape drive can do, whether it is one or a directory or file that stands in for one.
 *
 * Contract for every implementation (test/support/tape-suite.ts checks it):
 *
 * - A cartridge is a row of records and file marks, ended by the end of data. Files are counted from 0; file N begins behind mark N.
 * - Writing anywhere makes that place the end of data: what lay behind is gone.
 * - Errors are {@link B2Error} that name the drive and, where it is known, file and record. Kinds: `no-space` (the cartridge is full),
 *   `io` (a record cannot be read or written; the cartridge was pulled), `refused` (write protected), `not-found` (no drive, or no
 *   cartridge in it), `unsupported`.
 * - One call at a time.
 */

export interface TapeStatus {
  /** A cartridge is in the drive and ready. */
  readonly loaded: boolean;
  readonly writeProtected: boolean;
  /** The drive is known to be at the end of data. */
  readonly atEnd: boolean;
  /** File in which the head is, if the drive knows. */
  readonly file: number | undefined;
  /** Record in that file, if the drive knows. */
  readonly record: number | undefined;
  /** Length of the blocks in the fixed block mode; 0 in the variable one, in which a record has any length. */
  readonly blockBytes: number;
}

/** What a read found. */
export type TapeRead =
  /** A record: its bytes are at the start of the buffer. */
  | { readonly kind: 'record'; readonly bytes: number }
  /** A file mark; the head is behind it. */
  | { readonly kind: 'mark' }
  /** The end of data. */
  | { readonly kind: 'end' };

export interface TapeWritten {
  /** Whole records that are on the cartridge; fewer than asked for only together with `full`. */
  readonly records: number;
  /** The drive has warned that the end is near: finish what is being written. */
  readonly earlyWarning: boolean;
  /** The cartridge took no more. */
  readonly full: boolean;
}

export interface TapeDrive {
  /** As the user named it. */
  readonly path: string;
  /** Stopping costs it time (and wear): it is better given much at a time than a little whenever there is something. */
  readonly streams: boolean;
  status(): Promise<TapeStatus>;
  /**
   * Prepares for records of `recordBytes` (a multiple of 4096). `fixed` asks for the fixed block mode; otherwise the drive is put in the variable one
   * where it has one. Reading afterwards may meet shorter records.
   */
  setRecordBytes(recordBytes: number, fixed: boolean): Promise<void>;
  /** Switches compression by the drive; false where it cannot be set. */
  setCompression(on: boolean): Promise<boolean>;
  rewind(): Promise<void>;
  /**
   * Forward: to just behind the `count`-th mark from here. Rejects with `io` where there are fewer; the head is then at the
   * end of data.
   */
  spaceFiles(count: number): Promise<void>;
  /** Back over `count` records of this file (≥ 1). Rejects with `io` where there are fewer. */
  backRecords(count: number): Promise<void>;
  /** Forward over one record, also one that cannot be read. */
  skipRecord(): Promise<void>;
  /** To the end of data. */
  toEndOfData(): Promise<void>;
  /** Reads the next record, which must fit into `into`. An unreadable record rejects with `io`; the head may be before or behind it. */
  read(into: Buffer): Promise<TapeRead>;
  /** Writes `parts`, each of a whole number of records, one behind the other. */
  write(parts: readonly Buffer[]): Promise<TapeWritten>;
  /** Writes file marks; everything written before is on the medium when this resolves. */
  writeMarks(count: number): Promise<{ readonly earlyWarning: boolean }>;
  /** Ejects the cartridge, or takes the drive offline where it cannot. */
  eject(): Promise<void>;
  /** Loads what a changer or a person has put in; waits until it is ready. */
  load(): Promise<void>;
  close(): Promise<void>;
}
