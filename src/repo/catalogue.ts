/**
 * The local catalogue: what this machine remembers of a repository. It is a cache and can be deleted at any time; everything but the
 * memory of what was seen and verified is read again from the repository (`rebuild`).
 *
 * A file of SQLite in `CACHE/REPOSITORY-ID/catalogue.db`, mode 0600 in a directory of mode 0700. Journal mode is WAL: readers
 * (`status`) and a writer (`watch`, `verify`) of two processes do not wait for each other, and a busy writer is waited for up to 10
 * seconds. WAL needs shared memory between them, which they have: the cache is local by definition, and where the file system cannot
 * do it SQLite keeps the rollback journal, which only makes them wait. `synchronous` is NORMAL: a power cut may lose the last
 * entries, never the file. Every write is one transaction that says the same when it is repeated.
 *
 * Numbers above 2^53 (times) are 8-byte big-endian BLOBs, because sqlite3 binds a bigint as NULL and rounds. A file that is damaged, or of another
 * version, is moved aside and begun anew.
 */
import { chmod, mkdir, rename, rm } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import type { Database } from 'sqlite3';
import type { Clock } from '../clock.js';
import { B2Error, errnoOf, ioError, isKind, messageOf } from '../errors.js';
import { ObjectKind } from '../format/object.js';
import type { Repository } from './repository.js';
import { VolumeHistory } from './history.js';
import { commitRecordOf } from './segments/source.js';
import { listSnapshots, listVolumes } from './volume.js';

const SCHEMA_VERSION = 1;
const BUSY_MS = 10_000;
/** Between tries to set the journal mode. */
const WAL_PAUSE_MS = 20;
const FILE = 'catalogue.db';
/** Events kept. */
const MAX_EVENTS = 10_000;

const SCHEMA = `
CREATE TABLE volumes (id TEXT PRIMARY KEY, name TEXT NOT NULL, host TEXT NOT NULL, device TEXT NOT NULL,
  size_bytes INTEGER NOT NULL, created_ns BLOB NOT NULL, updated_ns BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE tips (volume TEXT PRIMARY KEY, name TEXT NOT NULL, seq INTEGER NOT NULL, hash TEXT NOT NULL,
  instant_ns BLOB NOT NULL, meta_updated_ns BLOB NOT NULL, seen_ns BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE snapshots (volume TEXT NOT NULL, name TEXT NOT NULL, seq INTEGER NOT NULL, hash TEXT NOT NULL,
  instant_ns BLOB NOT NULL, tags TEXT NOT NULL, PRIMARY KEY (volume, name)) WITHOUT ROWID;
CREATE TABLE tapes (label TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE packs (id TEXT PRIMARY KEY, generation INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
  verified_ns BLOB, damaged INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE configs (mac TEXT PRIMARY KEY, position INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, at_ns BLOB NOT NULL, kind TEXT NOT NULL, content TEXT NOT NULL);
PRAGMA user_version = ${SCHEMA_VERSION};
`;

/** The newest commit of a volume that this machine has seen acknowledged. */
export interface SeenTip {
  readonly volumeId: string;
  readonly name: string;
  readonly seq: number;
  /** Hex. */
  readonly hash: string;
  readonly instantNs: bigint;
}

export interface RememberedTip extends SeenTip {
  readonly seenNs: bigint;
  /** `updated` of the volume's meta object when it was seen last; 0 if never. */
  readonly metaUpdatedNs: bigint;
}

/** What the last verification of a pack's data said. */
export interface PackVerified {
  readonly packId: string;
  readonly generation: number;
  readonly sizeBytes: number;
  readonly verifiedNs: bigint | undefined;
  readonly damaged: boolean;
}

/** Something that happened, for `status`. */
export interface CatalogueEvent {
  readonly atNs: bigint;
  readonly kind: 'verify' | 'repair' | 'prune' | 'snapshot';
  readonly content: Readonly<Record<string, unknown>>;
}

export interface CatalogueOptions {
  /** The directory for caches of the settings. */
  readonly cacheDir: string;
  readonly repositoryId: string;
  readonly clock: Pick<Clock, 'nowNs'>;
  /** Hears of a catalogue that had to be begun anew. */
  readonly warn: (message: string) => void;
  /**
   * What cannot be written (its disk is full, another process holds it) is told to `warn`, once, and not remembered; else the call fails.
   * For those whose result counts more than that this machine remembers it.
   */
  readonly lenient?: boolean;
}

type Value = string | number | Buffer | null;
type Row = Readonly<Record<string, unknown>>;

function blob(ns: bigint): Buffer {
  const b = Buffer.alloc(8);
  b.writeBigUInt64BE(ns);
  return b;
}

function nsOf(v: unknown): bigint {
  return Buffer.isBuffer(v) && v.length === 8 ? v.readBigUInt64BE() : 0n;
}

const text = (v: unknown): string => (typeof v === 'string' ? v : '');
const int = (v: unknown): number => (typeof v === 'number' && Number.isSafeInteger(v) ? v : 0);

/** Where the catalogue of a repository lies. */
export function cataloguePath(cacheDir: string, repositoryId: string): string {
  return join(cacheDir, repositoryId, FILE);
}

/** See the file comment. All methods may be called at once; each is atomic. Failures are B2Error of kind `io`, `no-space` or `failed`. */
export class Catalogue implements AsyncDisposable {
  readonly path: string;
  private readonly db: Database;
  private readonly clock: Pick<Clock, 'nowNs'>;
  private last: Promise<unknown> = Promise.resolve();
  /** Of a lenient one: takes a write that failed. */
  private forgive: ((error: B2Error) => void) | undefined;

  private constructor(path: string, db: Database, clock: Pick<Clock, 'nowNs'>) {
    this.path = path;
    this.db = db;
    this.clock = clock;
  }

  /** Opens it, or makes an empty one. The sqlite3 package is loaded here, not before. */
  static async open(options: CatalogueOptions): Promise<Catalogue> {
    const dir = join(options.cacheDir, options.repositoryId);
    const path = join(dir, FILE);
    try {
      await mkdir(dir, { recursive: true, mode: 0o700 });
      await chmod(dir, 0o700);
    } catch (error) {
      throw ioError('make the directory', dir, error);
    }
    try {
      return (await Catalogue.openFile(path, options.clock)).lenient(options);
    } catch (error) {
      if (!isKind(error, 'damaged')) throw error;
      const aside = `${path}.damaged-${options.clock.nowNs()}`;
      try {
        await rename(path, aside);
        for (const end of ['-wal', '-shm']) await rm(`${path}${end}`, { force: true });
      } catch (failure) {
        // Another process was faster.
        if (errnoOf(failure) !== 'ENOENT') throw ioError('move aside', path, failure);
      }
      options.warn(
        `the local catalogue could not be used (${error.message}); it was moved to ${aside} and begun anew. What this machine had seen of the repository is forgotten.`,
      );
      return (await Catalogue.openFile(path, options.clock)).lenient(options);
    }
  }

  private lenient(options: CatalogueOptions): this {
    if (options.lenient !== true) return this;
    let isTold = false;
    this.forgive = (error) => {
      if (!isTold)
        options.warn(`${error.message}; what was seen of the repository is not remembered`);
      isTold = true;
    };
    return this;
  }

  private static async openFile(path: string, clock: Pick<Clock, 'nowNs'>): Promise<Catalogue> {
    const require = createRequire(import.meta.url);
    const sqlite = require('sqlite3') as typeof import('sqlite3');
    // SQLite gives its files the mode of the umask: make the file before it does.
    try {
      const { open } = await import('node:fs/promises');
      const handle = await open(path, 'a', 0o600);
      try {
        await handle.chmod(0o600);
      } finally {
        await handle.close();
      }
    } catch (error) {
      throw ioError('open', path, error);
    }
    const db = await new Promise<Database>((resolve, reject) => {
      const opened: Database = new sqlite.Database(path, sqlite.OPEN_READWRITE, (error) => {
        if (error === null) resolve(opened);
        else reject(sqlError(path, error));
      });
    });
    const catalogue = new Catalogue(path, db, clock);
    try {
      db.configure('busyTimeout', BUSY_MS);
      await catalogue.useWal();
      await catalogue.exec('PRAGMA synchronous = NORMAL; PRAGMA foreign_keys = ON;');
      const [check] = await catalogue.all('PRAGMA quick_check(1)');
      if (text(check?.['quick_check']) !== 'ok')
        throw new B2Error('damaged', `${path}: ${text(check?.['quick_check'])}`);
      await catalogue.prepare();
      return catalogue;
    } catch (error) {
      await catalogue.close();
      throw error;
    }
  }

  /**
   * Where two processes do this to a new file at once, SQLite waits for neither and tells one of them SQLITE_BUSY at once (it would be
   * a deadlock to wait for a lock while one holds another): again, then.
   */
  private async useWal(): Promise<void> {
    const beganNs = this.clock.nowNs();
    for (let tries = 1; ; tries++) {
      try {
        return await this.exec('PRAGMA journal_mode = WAL');
      } catch (error) {
        const isBusy = error instanceof B2Error && error.retryable;
        const waitedNs = this.clock.nowNs() - beganNs;
        if (!isBusy || tries * WAL_PAUSE_MS >= BUSY_MS || waitedNs >= BigInt(BUSY_MS) * 1_000_000n)
          throw error;
        await setTimeout(WAL_PAUSE_MS);
      }
    }
  }

  /** Makes the tables where there are none. Two processes may come here at once. */
  private async prepare(): Promise<void> {
    await this.exec('BEGIN IMMEDIATE');
    try {
      const [row] = await this.all('PRAGMA user_version');
      const version = int(row?.['user_version']);
      if (version === 0) {
        const [known] = await this.all(
          "SELECT count(*) AS n FROM sqlite_master WHERE type = 'table' AND name = 'tips'",
        );
        if (int(known?.['n']) !== 0)
          throw new B2Error('damaged', `${this.path}: tables without a version`);
        await this.exec(SCHEMA);
      } else if (version !== SCHEMA_VERSION) {
        throw new B2Error(
          'damaged',
          `${this.path}: it is of version ${version}, this b2 uses ${SCHEMA_VERSION}`,
        );
      }
      await this.exec('COMMIT');
    } catch (error) {
      await this.exec('ROLLBACK').catch(() => undefined); // the first failure is the one to tell
      throw error;
    }
  }

  private exec(sql: string): Promise<void> {
    return new Promise((resolve, reject) => {
      this.db.exec(sql, (error) =>
        error === null ? resolve() : reject(sqlError(this.path, error)),
      );
    });
  }

  private run(sql: string, values: readonly Value[]): Promise<void> {
    return new Promise((resolve, reject) => {
      this.db.run(sql, [...values], (error: Error | null) =>
        error === null ? resolve() : reject(sqlError(this.path, error)),
      );
    });
  }

  private all(sql: string, values: readonly Value[] = []): Promise<Row[]> {
    return new Promise((resolve, reject) => {
      this.db.all<Row>(sql, [...values], (error, rows) =>
        error === null ? resolve(rows) : reject(sqlError(this.path, error)),
      );
    });
  }

  /** Runs `fn` in one transaction, one at a time. */
  private transaction(fn: () => Promise<void>): Promise<void> {
    const done = this.last.then(async () => {
      await this.exec('BEGIN IMMEDIATE');
      try {
        await fn();
        await this.exec('COMMIT');
      } catch (error) {
        await this.exec('ROLLBACK').catch(() => undefined); // the first failure is the one to tell
        throw error;
      }
    });
    this.last = done.catch(() => undefined);
    const { forgive } = this;
    if (forgive === undefined) return done;
    return done.catch((error: unknown) => {
      if (!(error instanceof B2Error)) throw error;
      forgive(error);
    });
  }

  /** Remembers that a commit was seen to be acknowledged. An older one than is remembered changes nothing. */
  recordTip(tip: SeenTip): Promise<void> {
    return this.transaction(() => this.putTip(tip));
  }

  private putTip(tip: SeenTip): Promise<void> {
    return this.run(
      `INSERT INTO tips (volume, name, seq, hash, instant_ns, meta_updated_ns, seen_ns) VALUES (?, ?, ?, ?, ?, coalesce(
         (SELECT updated_ns FROM volumes WHERE id = ?1), x'0000000000000000'), ?)
       ON CONFLICT (volume) DO UPDATE SET name = excluded.name, seq = excluded.seq, hash = excluded.hash,
         instant_ns = excluded.instant_ns, seen_ns = excluded.seen_ns WHERE excluded.seq >= seq`,
      [tip.volumeId, tip.name, tip.seq, tip.hash, blob(tip.instantNs), blob(this.clock.nowNs())],
    );
  }

  /** By volume id. */
  async seenTips(): Promise<Map<string, RememberedTip>> {
    const rows = await this.all(
      `SELECT t.*, v.updated_ns AS updated FROM tips t LEFT JOIN volumes v ON v.id = t.volume ORDER BY t.volume`,
    );
    return new Map(
      rows.map((r) => [
        text(r['volume']),
        {
          volumeId: text(r['volume']),
          name: text(r['name']),
          seq: int(r['seq']),
          hash: text(r['hash']),
          instantNs: nsOf(r['instant_ns']),
          seenNs: nsOf(r['seen_ns']),
          metaUpdatedNs: nsOf(r['updated']),
        },
      ]),
    );
  }

  /** Forgets what was seen of a volume: after a repair that had to give up commits, or because somebody says so. */
  forgetTip(volumeId: string): Promise<void> {
    return this.transaction(() => this.run('DELETE FROM tips WHERE volume = ?', [volumeId]));
  }

  recordPacks(packs: readonly PackVerified[]): Promise<void> {
    return this.transaction(async () => {
      for (const p of packs) {
        await this.run(
          `INSERT INTO packs (id, generation, size_bytes, verified_ns, damaged) VALUES (?, ?, ?, ?, ?)
           ON CONFLICT (id) DO UPDATE SET generation = max(generation, excluded.generation), size_bytes = excluded.size_bytes,
             verified_ns = excluded.verified_ns, damaged = excluded.damaged`,
          [
            p.packId,
            p.generation,
            p.sizeBytes,
            p.verifiedNs === undefined ? null : blob(p.verifiedNs),
            p.damaged ? 1 : 0,
          ],
        );
      }
    });
  }

  async packs(): Promise<Map<string, PackVerified>> {
    const rows = await this.all('SELECT * FROM packs ORDER BY id');
    return new Map(
      rows.map((r) => [
        text(r['id']),
        {
          packId: text(r['id']),
          generation: int(r['generation']),
          sizeBytes: int(r['size_bytes']),
          verifiedNs: r['verified_ns'] === null ? undefined : nsOf(r['verified_ns']),
          damaged: int(r['damaged']) === 1,
        },
      ]),
    );
  }

  forgetPacks(packIds: readonly string[]): Promise<void> {
    return this.transaction(async () => {
      for (const id of packIds) await this.run('DELETE FROM packs WHERE id = ?', [id]);
    });
  }

  /** Remembers that `config` had this authentication code; the newest is the one recorded last. */
  recordConfig(mac: string): Promise<void> {
    return this.transaction(() =>
      this.run(
        `INSERT INTO configs (mac, position) VALUES (?1, (SELECT coalesce(max(position), 0) + 1 FROM configs))
         ON CONFLICT (mac) DO UPDATE SET position = (SELECT max(position) FROM configs) + 1
           WHERE position < (SELECT max(position) FROM configs)`,
        [mac],
      ),
    );
  }

  /** Oldest first. */
  async configs(): Promise<string[]> {
    return (await this.all('SELECT mac FROM configs ORDER BY position')).map((r) => text(r['mac']));
  }

  recordEvent(event: Omit<CatalogueEvent, 'atNs'>): Promise<void> {
    return this.transaction(async () => {
      await this.run('INSERT INTO events (at_ns, kind, content) VALUES (?, ?, ?)', [
        blob(this.clock.nowNs()),
        event.kind,
        JSON.stringify(event.content),
      ]);
      await this.run('DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?', [
        MAX_EVENTS,
      ]);
    });
  }

  /** The newest event of a kind. */
  async lastEvent(kind: CatalogueEvent['kind']): Promise<CatalogueEvent | undefined> {
    const [row] = await this.all('SELECT * FROM events WHERE kind = ? ORDER BY id DESC LIMIT 1', [
      kind,
    ]);
    if (row === undefined) return undefined;
    const content: unknown = JSON.parse(text(row['content']));
    return {
      atNs: nsOf(row['at_ns']),
      kind,
      content:
        typeof content === 'object' && content !== null ? (content as Record<string, unknown>) : {},
    };
  }

  /**
   * Fills volumes, newest points, snapshots and tapes from the repository. What was remembered of them and is no longer there goes, except
   * for the newest points seen: those are the memory against a repository that was put back.
   */
  async rebuild(
    repo: Repository,
    warn: (message: string) => void = () => undefined,
  ): Promise<void> {
    const volumes = await listVolumes(repo, warn);
    const tips: SeenTip[] = [];
    const snapshots: {
      volume: string;
      name: string;
      seq: number;
      hash: string;
      instantNs: bigint;
      tags: readonly string[];
    }[] = [];
    for (const v of volumes) {
      for (const s of await listSnapshots(repo, v.id, warn)) {
        snapshots.push({
          volume: v.id,
          name: s.name,
          seq: s.seq,
          hash: s.hash,
          instantNs: s.instantNs,
          tags: s.tags,
        });
      }
      try {
        const tip = await acknowledgedTip(repo, v.id, v.name);
        if (tip !== undefined) tips.push(tip);
      } catch (error) {
        if (!isKind(error, 'damaged')) throw error;
        warn(`volume ${v.name}: ${messageOf(error)}`);
      }
    }
    const tapes: { label: string; content: string }[] = [];
    for await (const { name } of repo.store.list('tapes')) {
      try {
        tapes.push({
          label: name.slice('tapes/'.length),
          content: JSON.stringify(await repo.getObject(ObjectKind.tape, name)),
        });
      } catch (error) {
        if (!isKind(error, 'damaged', 'not-found')) throw error;
        warn(messageOf(error));
      }
    }
    await this.transaction(async () => {
      for (const table of ['volumes', 'snapshots', 'tapes'])
        await this.exec(`DELETE FROM ${table}`);
      for (const v of volumes) {
        await this.run(
          'INSERT INTO volumes (id, name, host, device, size_bytes, created_ns, updated_ns) VALUES (?, ?, ?, ?, ?, ?, ?)',
          [v.id, v.name, v.host, v.device, v.sizeBytes, blob(v.createdNs), blob(v.updatedNs)],
        );
      }
      for (const s of snapshots) {
        await this.run(
          'INSERT OR REPLACE INTO snapshots (volume, name, seq, hash, instant_ns, tags) VALUES (?, ?, ?, ?, ?, ?)',
          [s.volume, s.name, s.seq, s.hash, blob(s.instantNs), JSON.stringify(s.tags)],
        );
      }
      for (const t of tapes)
        await this.run('INSERT INTO tapes (label, content) VALUES (?, ?)', [t.label, t.content]);
      for (const t of tips) await this.putTip(t);
    });
  }

  /** Every row, for comparison. Times of seeing are left out: they are this machine's. */
  async dump(): Promise<Readonly<Record<string, readonly Row[]>>> {
    return {
      volumes: await this.all('SELECT * FROM volumes ORDER BY id'),
      tips: await this.all('SELECT volume, name, seq, hash, instant_ns FROM tips ORDER BY volume'),
      snapshots: await this.all('SELECT * FROM snapshots ORDER BY volume, name'),
      tapes: await this.all('SELECT * FROM tapes ORDER BY label'),
    };
  }

  async close(): Promise<void> {
    await this.last;
    await new Promise<void>((resolve) => {
      // A failing close of a cache loses nothing that counts.
      this.db.close(() => resolve());
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** The last commit that a segment of the volume holds; of those in the journal the newest may not have been acknowledged. */
async function acknowledgedTip(
  repo: Repository,
  volumeId: string,
  name: string,
): Promise<SeenTip | undefined> {
  const history = await VolumeHistory.open(repo, volumeId);
  try {
    const last = history.deltas.at(-1);
    if (last === undefined) return undefined;
    const page = await last.commitPage(last.index.commits.length - 1, false);
    const c = await commitRecordOf(last, page.record(page.length - 1));
    return { volumeId, name, seq: c.seq, hash: c.hash.toString('hex'), instantNs: c.instantNs };
  } finally {
    await history.close();
  }
}

function sqlError(path: string, error: Error): B2Error {
  const errno = errnoOf(error);
  const message = `the local catalogue ${path}: ${error.message}`;
  switch (errno) {
    case 'SQLITE_CORRUPT':
    case 'SQLITE_NOTADB':
    case 'SQLITE_SCHEMA':
    case 'SQLITE_MISMATCH':
      return new B2Error('damaged', message, { cause: error, hint: 'It is a cache: delete it.' });
    case 'SQLITE_FULL':
      return new B2Error('no-space', message, { cause: error });
    case 'SQLITE_BUSY':
    case 'SQLITE_LOCKED':
      return new B2Error('io', message, {
        cause: error,
        retryable: true,
        hint: 'Another b2 process holds it for long.',
      });
    case undefined:
    default:
      return new B2Error('io', message, {
        cause: error,
        hint: 'It is a cache: delete it if nothing else helps.',
      });
  }
}
