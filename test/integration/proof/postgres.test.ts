/**
 * PostgreSQL under `b2 watch`: pgbench runs on a watched disk, points are restored, the server is started on each restored disk and
 * recovers, pg_amcheck finds nothing, and every transaction that pgbench was told of before the instant is there, none begun after it.
 *
 * The server only with `B2_PROOF_POSTGRES=1` (a minute; Debian's packages postgresql and postgresql-contrib).
 */
import { execFileSync, spawn } from 'node:child_process';
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import type { RestoreAnswer } from '../../../src/commands/run/restore.js';
import { TRACEFS } from '../../../src/devices/trace/instance.js';
import { B2 } from '../../support/b2.js';
import {
  LOOP_NEEDS,
  attachLoop,
  makeFileSystem,
  mountDevice,
  newLoop,
} from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir } from '../../support/tmp.js';
import { Watching, nanoseconds } from '../../support/workload-watch.js';

const MIB = 1024 * 1024;
const VOLUME = 'proof/postgres';
const SECONDS = Number(process.env['B2_PROOF_SECONDS'] ?? 20);
const CLIENTS = 4;
const RESTORES = 5;

/** Directory of the newest version's programs. */
function programs(): string | undefined {
  const root = '/usr/lib/postgresql';
  if (!existsSync(root)) return undefined;
  const [newest] = readdirSync(root).sort((a, b) => Number(b) - Number(a));
  const bin = path.join(root, newest ?? '', 'bin');
  return ['initdb', 'pg_ctl', 'psql', 'pgbench', 'pg_amcheck'].every((p) =>
    existsSync(path.join(bin, p)),
  )
    ? bin
    : undefined;
}

/** Ids of the user `postgres`. */
function postgresIds(): { readonly uid: number; readonly gid: number } {
  const id = (flag: string): number =>
    Number(execFileSync('id', [flag, 'postgres'], { encoding: 'utf8' }).trim());
  return { uid: id('-u'), gid: id('-g') };
}

interface Transaction {
  readonly client: number;
  /** 1, 2, 3 … of this client. */
  readonly number: number;
  readonly beganNs: bigint;
  readonly ackedNs: bigint;
}

/** pgbench's log: client, transaction, microseconds taken, script, seconds and microseconds since 1970. */
function readTransactions(dir: string): Transaction[] {
  const all: Transaction[] = [];
  for (const name of readdirSync(dir).filter((n) => n.startsWith('pgbench_log.'))) {
    for (const line of readFileSync(path.join(dir, name), 'utf8').split('\n')) {
      if (line === '') continue;
      const [client = '', number = '', tookUs = '', , s = '', us = ''] = line.split(' ');
      const ackedNs = BigInt(s) * 1_000_000_000n + BigInt(us) * 1000n;
      all.push({
        client: Number(client),
        number: Number(number),
        ackedNs,
        beganNs: ackedNs - BigInt(tookUs) * 1000n,
      });
    }
  }
  return all;
}

class Postgres {
  private readonly bin: string;
  private readonly ids: { readonly uid: number; readonly gid: number };
  private readonly sockets: string;

  constructor(bin: string, sockets: string) {
    this.bin = bin;
    this.ids = postgresIds();
    this.sockets = sockets;
    mkdirSync(sockets, { recursive: true });
    chownSync(sockets, this.ids.uid, this.ids.gid);
  }

  own(file: string): void {
    chownSync(file, this.ids.uid, this.ids.gid);
  }

  private options(cwd: string): object {
    return {
      ...this.ids,
      cwd,
      encoding: 'utf8' as const,
      stdio: ['ignore', 'pipe', 'pipe'] as const,
      env: { PATH: process.env['PATH'], LC_ALL: 'C', PGHOST: this.sockets, PGUSER: 'postgres' },
    };
  }

  run(name: string, ...args: string[]): string {
    return String(execFileSync(path.join(this.bin, name), args, this.options(this.sockets)));
  }

  start(data: string): void {
    const log = path.join(this.sockets, 'server.log');
    execFileSync(
      path.join(this.bin, 'pg_ctl'),
      [
        'start',
        '-w',
        '-s',
        '-t',
        '120',
        '-D',
        data,
        '-l',
        log,
        '-o',
        `-k ${this.sockets} -c listen_addresses=''`,
      ],
      { ...this.options(this.sockets), stdio: 'ignore' },
    );
  }

  stop(data: string): void {
    this.run('pg_ctl', 'stop', '-w', '-s', '-m', 'fast', '-D', data);
  }

  async bench(cwd: string, ...args: string[]): Promise<void> {
    const child = spawn(path.join(this.bin, 'pgbench'), args, this.options(cwd));
    let said = '';
    child.stderr?.on('data', (data: Buffer) => (said += data.toString()));
    const code = await new Promise((resolve, reject) => {
      child.on('error', reject);
      child.on('exit', resolve);
    });
    if (code !== 0) throw new Error(`pgbench ended with ${String(code)}: ${said}`);
  }
}

/** The usual transaction of pgbench, and a row that tells which one it was. */
const SCRIPT = `
\\set n :n + 1
\\set aid random(1, 100000 * :scale)
\\set tid random(1, 10 * :scale)
\\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, 1, :aid, :delta, CURRENT_TIMESTAMP);
INSERT INTO told (client, n) VALUES (:client_id, :n);
END;
`;

describe('a database server on a watched disk', () => {
  it('is held against what pgbench logged', async () => {
    await using dir = tempDir();
    writeFileSync(dir.join('pgbench_log.7'), '3 12 2500 0 1700000000 000750\n');
    expect(readTransactions(dir.path)).toEqual([
      {
        client: 3,
        number: 12,
        ackedNs: 1_700_000_000_000_750_000n,
        beganNs: 1_699_999_999_998_250_000n,
      },
    ]);
  });
  if (process.env['B2_PROOF_POSTGRES'] !== '1') return;
  requires({
    ...LOOP_NEEDS,
    tools: [...(LOOP_NEEDS.tools ?? []), 'mkfs.ext4'],
    paths: [...(LOOP_NEEDS.paths ?? []), TRACEFS],
    also: () => (programs() === undefined ? 'PostgreSQL with pgbench and pg_amcheck' : undefined),
  }).it(
    'starts on every restored point, with all transactions acknowledged before',
    async () => {
      const bin = programs();
      if (bin === undefined) throw new Error('no PostgreSQL');
      await using dir = tempDir();
      // Its user has to get to its directories below.
      chmodSync(dir.path, 0o711);
      const pg = new Postgres(bin, dir.join('sockets'));
      const b2 = new B2(dir, { B2_RUNTIME_DIR: dir.join('run') });
      await b2.json(['init', '--encryption', 'none']);
      const loop = await newLoop(dir, 'disk', 768 * MIB);
      await makeFileSystem('ext4', loop.device);
      const mount = await mountDevice(dir, loop.device, 'mnt');
      pg.own(mount.path);
      const data = path.join(mount.path, 'data');
      pg.run('initdb', '-D', data, '-k', '-U', 'postgres', '--auth=trust');
      pg.start(data);
      const points: { readonly seq: number; readonly instantNs: bigint }[] = [];
      const bench = dir.join('bench');
      mkdirSync(bench);
      pg.own(bench);
      try {
        pg.run('pgbench', '-i', '-q', '-s', '2', 'postgres');
        pg.run(
          'psql',
          '-q',
          '-d',
          'postgres',
          '-c',
          'CREATE EXTENSION amcheck; CREATE TABLE told (client int, n int, PRIMARY KEY (client, n))',
        );
        const watching = Watching.start(
          dir,
          b2,
          loop.device,
          '--volume',
          VOLUME,
          '--interval',
          '250ms',
        );
        await watching.ready(1);
        writeFileSync(path.join(bench, 'script.sql'), SCRIPT);
        await pg.bench(
          bench,
          '-n',
          '-c',
          String(CLIENTS),
          '-j',
          '1',
          '-T',
          String(SECONDS),
          '-R',
          '150',
          '-D',
          'n=0',
          '-D',
          'scale=2',
          '-l',
          '-f',
          path.join(bench, 'script.sql'),
          'postgres',
        );
        points.push(...watching.points.slice(1));
        expect(watching.troubles).toEqual([]);
        await watching.stop();
      } finally {
        pg.stop(data);
      }
      await mount.unmount();
      await loop.detach();

      const log = readTransactions(bench);
      expect(log.length).toBeGreaterThan(100);
      expect(points.length).toBeGreaterThan(RESTORES);
      const faults: string[] = [];
      let found = 0;
      for (let k = 0; k < RESTORES; k++) {
        const seq = points[Math.floor(((k + 1) * points.length) / RESTORES) - 1]?.seq ?? 0;
        const file = dir.join('restored.img');
        const { point } = await b2.json<RestoreAnswer>([
          'restore',
          VOLUME,
          file,
          '--at',
          `#${seq}`,
          '--no-verify',
        ]);
        const instantNs = nanoseconds(point.time);
        const copy = await attachLoop(dir, file);
        const copyMount = await mountDevice(dir, copy.device, 'copy');
        const copyData = path.join(copyMount.path, 'data');
        try {
          pg.start(copyData);
          try {
            pg.run('pg_amcheck', '--all', '--heapallindexed', '--parent-check', '--rootdescend');
            const rows = pg.run(
              'psql',
              '-At',
              '-F',
              ' ',
              '-d',
              'postgres',
              '-c',
              'SELECT client, max(n), count(*) FROM told GROUP BY client',
            );
            const newest = new Map<number, number>();
            for (const line of rows
              .trim()
              .split('\n')
              .filter((l) => l !== '')) {
              const [client = 0, max = 0, count = 0] = line.split(' ').map(Number);
              newest.set(client, max);
              found += count;
              if (count !== max)
                faults.push(`#${seq}: client ${client} has ${count} rows up to ${max}`);
            }
            for (let client = 0; client < CLIENTS; client++) {
              const own = log.filter((t) => t.client === client);
              const least = Math.max(
                0,
                ...own.filter((t) => t.ackedNs < instantNs).map((t) => t.number),
              );
              const most = Math.max(
                0,
                ...own.filter((t) => t.beganNs <= instantNs).map((t) => t.number),
              );
              const has = newest.get(client) ?? 0;
              if (has < least)
                faults.push(`#${seq}: client ${client} has ${has}, was told of ${least}`);
              if (has > most)
                faults.push(`#${seq}: client ${client} has ${has}, had begun ${most}`);
            }
          } finally {
            pg.stop(copyData);
          }
        } catch (error) {
          faults.push(`#${seq}: ${String(error)}`);
        }
        await copyMount.unmount();
        await copy.detach();
        rmSync(file);
      }
      process.stderr.write(
        `postgres: ${log.length} transactions, ${points.length} points, ${RESTORES} restored and started, ${found} rows found in them; ${faults.length} faults\n`,
      );
      expect(faults).toEqual([]);
    },
    600_000 + SECONDS * 5000,
  );
});
