/** Puts what live capture read into a repository: chunks, holes, one commit. */
import { B2Error, isKind } from '../errors.js';
import { PointClass } from '../format/commit.js';
import { CondemnedError, type VolumeWriter } from '../repo/volume-writer.js';
import type { RunScanner } from './baseline.js';
import type {
  CaptureCommit,
  CaptureSink,
  CommitDone,
  ScanOutcome,
  ScanRequest,
} from './live-capture.js';
import { namingOldEnd, storeBlocks } from './pieces.js';

export interface WriterSinkOptions {
  /** Claims the volume. Called at the first commit, and again after one that failed. */
  readonly open: () => Promise<VolumeWriter>;
  /** Said in every commit: source, host, device. */
  readonly facts: Readonly<Record<string, unknown>>;
  /** Hears of failures that cost nothing (a pack that could not be sealed; it is read forward next time). */
  readonly warn: (error: B2Error) => void;
  /** With it first scans and resyncs store only what differs (see {@link CaptureSink.scan}). */
  readonly scanner?: RunScanner | undefined;
}

/** How often a commit that met prune is made anew at once. */
const MAX_CONDEMNED = 4;
/** Two slabs of the pack writer. */
const WRITER_BYTES = 16 * 1024 * 1024;

/**
 * Commits to a volume through its one writer. When a commit fails the writer is given up, and the volume claimed anew at the next;
 * not after `lost-claim`: then every commit rejects with it. What prune wants to delete is stored anew at once.
 */
export class WriterSink implements CaptureSink, AsyncDisposable {
  readonly scan: ((request: ScanRequest) => Promise<ScanOutcome>) | undefined;
  private readonly options: WriterSinkOptions;
  private writer: VolumeWriter | undefined;
  /** Another writer has taken over: taking the volume back would only make the two fight. */
  private lost: B2Error | undefined;

  constructor(options: WriterSinkOptions) {
    this.options = options;
    const { scanner } = options;
    if (scanner !== undefined)
      this.scan = (request) => this.use((writer) => scanner.scan(writer, request));
  }

  get memoryBytes(): number {
    const { scanner } = this.options;
    return (this.writer === undefined ? 0 : WRITER_BYTES) + (scanner?.memoryBytes ?? 0);
  }

  /** Claims the volume if that is not done, and begins a pack, which shows whether the repository can be written to. */
  async prepare(): Promise<void> {
    await this.use((writer) => writer.openPack());
  }

  async commit(commit: CaptureCommit): Promise<CommitDone> {
    const done = await this.use((writer) => this.write(writer, commit));
    // Until there is a point, more may have to be scanned.
    if (commit.pointClass !== PointClass.none) await this.options.scanner?.release();
    return done;
  }

  private async write(writer: VolumeWriter, commit: CaptureCommit): Promise<CommitDone> {
    const { sizeBytes } = commit;
    for (let tries = 1; ; tries++) {
      const pack = await writer.openPack();
      const before = pack.sizeBytes;
      const extents = await storeBlocks(writer, commit.content, sizeBytes);
      try {
        const { seq } = await writer.commit({
          pointClass: commit.pointClass,
          coverage: commit.coverage,
          full: writer.tipSeq === 0,
          instantNs: commit.instantNs,
          startedNs: commit.startedNs,
          sizeBytes,
          extents:
            commit.pointClass === PointClass.none
              ? namingOldEnd(extents, writer.tipSizeBytes, sizeBytes)
              : extents,
          storedBytes: pack.sizeBytes - before,
          facts: {
            ...this.options.facts,
            ...(commit.group === undefined ? {} : { group: commit.group }),
            ...(commit.unreadable === undefined ? {} : { unreadable: commit.unreadable }),
          },
        });
        const storedBytes = pack.sizeBytes - before;
        await this.finishFull(writer);
        return { seq, storedBytes };
      } catch (error) {
        if (!(error instanceof CondemnedError) || tries >= MAX_CONDEMNED) throw error;
        await writer.reclaim();
      }
    }
  }

  /** Runs `work` with the writer, which is given up when that fails. */
  private async use<T>(work: (writer: VolumeWriter) => Promise<T>): Promise<T> {
    if (this.lost !== undefined) throw this.lost;
    const writer = (this.writer ??= await this.options.open());
    try {
      return await work(writer);
    } catch (error) {
      if (isKind(error, 'lost-claim')) this.lost = error;
      await this.giveUp(writer);
      throw error;
    }
  }

  /** Seals a pack that is full. The commit is acknowledged already and lives without that. */
  private async finishFull(writer: VolumeWriter): Promise<void> {
    if (!writer.wantsFinish) return;
    try {
      await writer.finishPack();
    } catch (error) {
      if (!(error instanceof B2Error)) throw error;
      this.options.warn(error);
      await this.giveUp(writer);
    }
  }

  private async giveUp(writer: VolumeWriter): Promise<void> {
    this.writer = undefined;
    await writer.close(this.options.warn).catch(() => undefined); // the error at hand is the one to report
  }

  /** Seals the open pack. */
  async close(): Promise<void> {
    const { writer } = this;
    this.writer = undefined;
    await this.options.scanner?.release();
    await writer?.close(this.options.warn);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
