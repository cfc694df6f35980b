/** verify, repair, status and prune as a person and as a monitoring system use them. */
import { spawnSync } from 'node:child_process';
import {
  openSync,
  readdirSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
  closeSync,
  copyFileSync,
  existsSync,
} from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { tempDir } from '../support/tmp.js';

const program = fileURLToPath(new URL('../../bin/b2', import.meta.url));

interface Done {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

function runner(
  dir: string,
  secret: Readonly<Record<string, string>> = { B2_KEY_FILE: join(dir, 'key') },
): (...args: readonly string[]) => Done {
  return (...args) => {
    const done = spawnSync(program, args, {
      encoding: 'utf8',
      env: {
        PATH: process.env['PATH'],
        HOME: join(dir, 'home'),
        B2_CONFIG: '/dev/null',
        B2_CACHE_DIR: join(dir, 'cache'),
        B2_REPOSITORY: join(dir, 'repo'),
        ...secret,
      },
    });
    return { code: done.status, stdout: done.stdout, stderr: done.stderr };
  };
}

function filesBelow(dir: string): string[] {
  return readdirSync(dir, { recursive: true, withFileTypes: true })
    .filter((e) => e.isFile())
    .map((e) => join(e.parentPath, e.name));
}

function overwrite(file: string, at: number, text: string): void {
  const fd = openSync(file, 'r+');
  try {
    writeSync(fd, text, at);
  } finally {
    closeSync(fd);
  }
}

/** Bytes that do not compress and do not repeat. */
function noise(bytes: number): Buffer {
  const b = Buffer.alloc(bytes);
  let a = 1;
  for (let i = 0; i + 4 <= bytes; i += 4) {
    a = (Math.imul(a, 1_664_525) + 1_013_904_223) >>> 0;
    b.writeUInt32LE(a, i);
  }
  return b;
}

describe('verify, repair, status, prune', () => {
  it('find damage, say what it touches, and bring back what can be brought back', async () => {
    await using dir = tempDir();
    const b2 = runner(dir.path);
    const image = dir.join('img');
    writeFileSync(image, noise(6 * 1024 * 1024));
    expect(b2('init').code).toBe(0);
    expect(b2('snapshot', image, '--volume', 'h/img', '--name', 'one')).toMatchObject({ code: 0 });

    expect(b2('verify', '--data', 'all')).toMatchObject({
      code: 0,
      stdout: expect.stringContaining('no damage'),
    });
    expect(b2('verify', '--against', image)).toMatchObject({
      code: 0,
      stdout: expect.stringContaining('nothing differs'),
    });
    expect(b2('verify', '--nagios', '--max-lag', '1h')).toMatchObject({
      code: 0,
      stdout: expect.stringMatching(
        /^B2 OK - .* \| damage=0;;0 unreadable=0;0; lag_h\/img=[\d.]+s;;3600 read=0B;;\n$/,
      ),
    });
    expect(b2('verify', '--max-lag', '1ms').code).toBe(6);
    expect(b2('status', '--max-lag', '1ms').code).toBe(6);
    expect(b2('status', '--nagios', '--max-lag', '1ms')).toMatchObject({
      code: 2,
      stdout: expect.stringMatching(/^B2 CRITICAL - /),
    });
    const status: unknown = JSON.parse(b2('status', '--json').stdout);
    expect(status).toMatchObject({
      volumes: [{ name: 'h/img', exactPoints: 1 }],
      lastVerify: { damage: 0 },
      condemnedBytes: 0,
    });
    const catalogue = filesBelow(dir.join('cache')).find((f) => f.endsWith('catalogue.db')) ?? '';
    expect(statSync(catalogue).mode & 0o777).toBe(0o600);

    overwrite(image, 1_000_000, 'x');
    const differs = b2('verify', '--against', image, '--json');
    expect(differs.code).toBe(5);
    expect(JSON.parse(differs.stdout)).toMatchObject({
      against: { ranges: [{ offset: 999_424, length: 4096 }], differingBytes: 4096 },
    });

    const pack =
      filesBelow(dir.join('repo', 'packs')).sort(
        (a, b) => statSync(b).size - statSync(a).size,
      )[0] ?? '';
    copyFileSync(pack, dir.join('good'));
    overwrite(pack, 500_000, 'damage');
    const found = b2('verify', '--data', 'all', '--json');
    expect(found.code).toBe(5);
    expect(JSON.parse(found.stdout)).toMatchObject({
      damage: 1,
      findings: [
        {
          severity: 'damage',
          kind: 'frame',
          touches: [{ name: 'h/img', points: 1, bytes: 65_536 }],
        },
      ],
    });
    expect(b2('verify', '--nagios')).toMatchObject({
      code: 2,
      stdout: expect.stringMatching(/^B2 CRITICAL - 1 damaged: packs/),
    });
    expect(b2('repair', '--dry-run', '--json')).toMatchObject({ code: 0 });
    expect(existsSync(dir.join('repo', 'quarantine'))).toBe(false);
    expect(JSON.parse(b2('repair', '--json').stdout)).toMatchObject({
      actions: [{ kind: 'quarantine' }],
      left: [],
    });
    expect(b2('repair')).toMatchObject({ code: 0, stdout: 'nothing to repair\n' });
    // A capture stores again what was damaged, because the device still has it.
    expect(b2('snapshot', image, '--volume', 'h/img', '--name', 'two').code).toBe(0);
    expect(JSON.parse(b2('verify', '--json').stdout)).toMatchObject({
      volumes: [{ damagedPoints: 1, newestWhole: { id: '#2' } }],
    });
    expect(b2('restore', 'h/img', dir.join('out')).code).toBe(0);
    expect(spawnSync('cmp', [image, dir.join('out')]).status).toBe(0);

    copyFileSync(dir.join('good'), pack);
    rmSync(dir.join('repo', 'volumes'), { recursive: true });
    rmSync(dir.join('cache'), { recursive: true });
    expect(b2('verify').code).toBe(5);
    expect(b2('repair').code).toBe(0);
    expect(b2('verify', '--data', 'all')).toMatchObject({
      code: 0,
      stdout: expect.stringContaining('h/img: 2 commits'),
    });
    expect(b2('restore', 'h/img', dir.join('again')).code).toBe(0);
    expect(spawnSync('cmp', [image, dir.join('again')]).status).toBe(0);
    expect(JSON.parse(b2('prune', '--dry-run', '--json').stdout)).toMatchObject({
      dryRun: true,
      condemnedPacks: 0,
    });
    expect(b2('prune').code).toBe(0);
  });

  it('ends with the codes of the command line', async () => {
    await using dir = tempDir();
    const b2 = runner(dir.path, {});
    expect(b2('verify').code).toBe(10);
    expect(b2('verify', '--nagios')).toMatchObject({
      code: 3,
      stdout: expect.stringMatching(/^B2 UNKNOWN - /),
    });
    expect(b2('init', '--encryption', 'none').code).toBe(0);
    expect(b2('verify', 'nothing').code).toBe(4);
    expect(b2('verify', '--data', '0%').code).toBe(2);
    expect(b2('verify', '--against', '/dev/null').code).toBe(2);
    expect(b2('status', '--nagios')).toMatchObject({
      code: 1,
      stdout: expect.stringMatching(/^B2 WARNING - /),
    });
  });
});
